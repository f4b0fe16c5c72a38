"""Builds what a run of gpu_suite.py need not build on the machine with the GPU: the native library, for its Python and torch.

    python bench/gpu_bundle.py [--out build/gpu-bundle] [--python python3.12] [--torch 2.11.0]

Needs nvcc, a C++ compiler and that Python with its headers; no GPU, and no torch in it: the CUDA build of torch is fetched
once, and only its headers and libraries are unpacked. gpu_suite.py takes the folder where the library loads.
"""

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))
from builds import fetched_torch, run  # noqa: E402

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu-bundle")
parser.add_argument("--python", default="python3.12", help="of the version on that machine")
parser.add_argument("--torch", default="2.11.0", help="of the version on that machine")
options = parser.parse_args()
version = run(options.python, "-c", "import sys; print('%d.%d' % sys.version_info[:2])").strip()
settings = {"IMM_BUILD_NATIVE": "1", "IMM_BUILD_CUDA": "1", "CUDAARCHS": "90-real"}
settings["IMM_TORCH_DIR"] = str(fetched_torch(options.torch, version))
with tempfile.TemporaryDirectory() as name:
    folder, pinned = Path(name), ROOT / "constraints.txt"
    run(options.python, "-m", "venv", folder / "env")
    own = folder / "env" / "bin" / "python"
    run(own, "-m", "pip", "install", "--quiet", "--constraint", pinned, "setuptools", "wheel", "cmake", "ninja")
    run(own, "setup.py", "-q", "build_ext", "--build-lib", folder / "lib", **settings)
    shutil.rmtree(options.out, ignore_errors=True)
    shutil.copytree(folder / "lib" / "imm" / "_native", options.out)
print(f"{options.out}: {', '.join(sorted(path.name for path in options.out.iterdir()))}")
