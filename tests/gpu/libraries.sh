# Sourced by the scripts of this folder: puts the folder with cuBLAS of an installed Python package `nvidia-cublas` on
# LD_LIBRARY_PATH where the system's loader does not find libcublasLt.so.13 by itself. Downloads nothing.
if ! ldconfig -p 2>/dev/null | grep -q 'libcublasLt\.so\.13'; then
  cublas=$(python3 -c 'import importlib.util as u, pathlib as p
spec = u.find_spec("nvidia")
found = [f for root in (spec.submodule_search_locations if spec else []) for f in p.Path(root).rglob("libcublasLt.so.13")]
print(found[0].parent if found else "")')
  if [ -n "$cublas" ]; then
    export LD_LIBRARY_PATH="$cublas${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
  fi
fi
