#!/bin/sh
# Before a chat on a terminal: what the demo is, what to try, and how to get a real model.
[ "$1" = demo ] && [ -t 1 ] || exit 0
echo "This is the demo: a tiny shopkeeper. Try: What do you sell? / How much for two ropes and a brass lamp? / Any news?  The real model: make download && make run MODEL=models/Qwen3-0.6B"
