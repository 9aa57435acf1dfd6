#!/bin/sh
# Print nvcc's -gencode options: the GPU in this machine, or else every supported generation; what these do not name
# (7.5, 8.6 without its own code, 10.x) compiles the PTX of 7.5 or 8.0 when it first loads it.
# usage: cuda_arch.sh NVCC       ("" prints nothing; "all": every generation, whatever is here)
[ -n "$1" ] || exit 0
native=
[ "$1" = all ] || native=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | tr -d . | sort -u | grep -E '^[0-9]+$')
for cap in ${native:-80 90 120}; do
    [ "$cap" = 90 ] && cap=90a          # Hopper's own instructions
    printf -- '-gencode=arch=compute_%s,code=sm_%s ' "$cap" "$cap"
done
[ -n "$native" ] || printf -- '-gencode=arch=compute_75,code=compute_75 -gencode=arch=compute_80,code=compute_80'

