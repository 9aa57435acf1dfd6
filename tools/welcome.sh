#!/bin/sh
# Before a chat on a terminal: what the demo is, what to try, and how to get a real model.
[ "$1" = demo ] && [ -t 1 ] || exit 0
echo "This is the demo: a tiny shopkeeper (2-digit sums, no world knowledge). Try: What do you sell?  The real model: make download && make run MODEL=models/Qwen3-0.6B"
