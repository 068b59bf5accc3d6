"""Where weights lie: safetensors headers, indexes, byte ranges, folders. No mathematics."""
