"""Architectures with Hugging Face names, and the anatomy of any causal language model.

`config` describes a model without loading torch; `decoder` is the one network behind all families; `masks` is the
only place that builds attention masks; `loss` is the cross-entropy that never holds all logits; `anatomy` names the
parts of our models and of any `transformers` causal language model.
"""
