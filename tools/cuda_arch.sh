#!/bin/sh
# Print nvcc's -gencode options: the GPU in this machine, or else every supported generation.
# usage: cuda_arch.sh NVCC       ("" prints nothing; "all": every generation, whatever is here)
[ -n "$1" ] || exit 0
native=
[ "$1" = all ] || native=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | tr -d . | sort -u | grep -E '^[0-9]+$')
for cap in ${native:-80 90 120}; do
    [ "$cap" = 90 ] && cap=90a          # Hopper's own instructions
    printf -- '-gencode=arch=compute_%s,code=sm_%s ' "$cap" "$cap"
done
