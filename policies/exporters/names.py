"""What the targets are called, without the code that writes them: `--help` needs no more."""

NAMES = ("comfy", "comfy-int8", "sdnq", "torchao", "modelopt")
