"""Layers to swap in, one a file, each with its formula: `swap: [{at: "...", with: "engine.layers.rmsnorm:RMSNorm"}]`."""
