"""The names of the targets, without the code that writes them, because `--help` needs only the names."""

NAMES = ("comfy", "comfy-int8", "sdnq", "torchao", "modelopt", "gguf")
