"""Records llama.cpp's logits on GGUF files that zebroid has written of the embedded teacher: plain, with every kind of RoPE scaling,
and quantised. tests/golden/gguf.rs writes the same files again and compares; whoever changes how weights are rounded records again.

    python3 -m pip install llama-cpp-python numpy safetensors      # recorded with llama-cpp-python 0.3.36
    cargo build --release && python3 tests/golden/gguf/make.py
"""

import json
import os
import pathlib
import shutil
import subprocess
import tempfile

import llama_cpp
import numpy
from safetensors.numpy import save_file


def as_they_stand(defaults=llama_cpp.llama_cpp.llama_model_default_params):
    """Weights are not packed anew: tiles of AMX crash with some versions and compilers."""
    params = defaults()
    params.use_extra_bufts = False
    return params


llama_cpp.llama_cpp.llama_model_default_params = as_they_stand
root = pathlib.Path(__file__).parents[3]
zebroid = os.environ.get("ZEBROID", root / "target/release/zebroid")
here = pathlib.Path(__file__).parent
cases = json.loads((here / "cases.json").read_text())
ids = cases["ids"]
found = {}
with tempfile.TemporaryDirectory() as scratch:
    scratch = pathlib.Path(scratch)
    for name, case in cases["files"].items():
        folder = scratch / name
        shutil.copytree(root / "assets/teacher", folder)
        config = json.loads((folder / "config.json").read_text())
        config["rope_scaling"] = case.get("rope_scaling")
        (folder / "config.json").write_text(json.dumps(config))
        file = scratch / f"{name}.gguf"
        command = ["quantize", folder, file, "--type", case["type"]] if "type" in case else ["export", folder, file, "--format", "gguf"]
        subprocess.run([zebroid, *command], check=True)
        model = llama_cpp.Llama(str(file), n_ctx=256, logits_all=True, verbose=False)
        model.eval(ids)
        found[name] = numpy.array(model.scores[: len(ids)], numpy.float32)
save_file(found, here / "expected.safetensors")
print({name: logits.shape for name, logits in found.items()})
