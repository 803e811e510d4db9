"""What a card says of every model of a family: its task on hubs, what it does by its making, and how it is used."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Portrait:
    """Words about a family. `code` is Python in which `{path}` stands for the checkpoint; `library` is what opens it there."""

    task: str
    """The task, as hubs name it: text-generation, image-classification."""
    use: str
    """What such a model does by its making, and what nobody has shown of it: the sentence goes on from 'By its making it is a FAMILY'."""
    code: str
    library: str = "transformers"
    command: str = ""
    """A command of cairn that does the same."""


_UNSHOWN = "it was not shown to follow instructions, to tell the truth, or to be safe in front of people."

CAUSAL_LM = Portrait(
    "text-generation",
    f"language model that continues text of the kind it was trained on; {_UNSHOWN}",
    """from transformers import AutoModelForCausalLM, AutoTokenizer

path = {path}
model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
ids = tokenizer("The first stone", return_tensors="pt").input_ids
print(tokenizer.decode(model.generate(ids, max_new_tokens=20)[0]))""",
    command="`cairn generate PATH --prompt 'The first stone'`",
)
ENCODER_DECODER = Portrait(
    "text2text-generation",
    f"encoder-decoder that answers text with text, as it was trained to; {_UNSHOWN}",
    CAUSAL_LM.code.replace("AutoModelForCausalLM", "AutoModelForSeq2SeqLM"),
    command=CAUSAL_LM.command,
)
_CLASSES = "that tells the classes named in config.json apart in {} of the kind it was trained on; it was not shown to be right about any others."
IMAGE_CLASSIFIER = Portrait(
    "image-classification",
    _CLASSES.format("pictures"),
    """from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification

path = {path}
model, processor = AutoModelForImageClassification.from_pretrained(path), AutoImageProcessor.from_pretrained(path)
logits = model(**processor(Image.open("picture.png"), return_tensors="pt")).logits
print(model.config.id2label[int(logits.argmax())])""",
)
OWN_IMAGE_CLASSIFIER = Portrait(
    "image-classification",
    _CLASSES.format("pictures"),
    """import cairn

for found in cairn.explain({path}, prompt="picture.png").example["top"]:
    print(found["text"], found["probability"])""",
    library="cairn",
)
AUTOENCODER = Portrait(
    "unconditional-image-generation",
    "variational autoencoder that draws pictures of the kind it was trained on and says how probable a picture is; it was not shown to know any others.",
    """import cairn
from cairn.fields.vision.autoencoder import drawn

images = drawn(cairn.open({path}).model(), count=16, seed=0)
print(images.shape)""",
    library="cairn",
)
TAGGER = Portrait(
    "token-classification",
    "tagger that gives each word of a sentence one of the tags named in config.json; it was not shown to be right about text of any other kind.",
    """import cairn

print(cairn.explain({path}, prompt="The first stone of the trail").example["tags"])""",
    library="cairn",
)
