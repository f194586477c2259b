"""The names of formats and rounding methods, without the code behind them: `--help` imports only this."""

DEFAULT_FORMATS = ("int4", "int8", "fp16")
WRITE = (
    "int2 to int8, each with -g32, -g64, -g128 or -channel, -sym or -asym, and -rot; nf4, fp8, fp16; or all; "
    "for ComfyUI int4-convrot, int8-convrot; for processors that multiply them nvfp4, mxfp4, mxfp8, fp8-tensor"
)
DEFAULT_QUANTIZER = "gptq"  # docs/decisions/rounding.md says why
