"""From documents to tokens: tokenizers, token files, packing, denoising."""
