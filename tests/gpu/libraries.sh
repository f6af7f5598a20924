# Sourced by the scripts of this folder: puts the folders with cuBLAS and NCCL of installed Python packages (`nvidia-cublas`,
# `nvidia-nccl-cu13`) on LD_LIBRARY_PATH where the system's loader does not find them by itself. Downloads nothing.
for library in libcublasLt.so.13 libnccl.so.2; do
  if python3 -c "import ctypes; ctypes.CDLL('$library')" 2>/dev/null; then
    continue
  fi
  folder=$(python3 -c 'import importlib.util as u, pathlib as p, sys
spec = u.find_spec("nvidia")
found = [f for root in (spec.submodule_search_locations if spec else []) for f in p.Path(root).rglob(sys.argv[1])]
print(found[0].parent if found else "")' "$library")
  if [ -n "$folder" ]; then
    export LD_LIBRARY_PATH="${LD_LIBRARY_PATH:+$LD_LIBRARY_PATH:}$folder"
  fi
done
