"""Files that appear whole or not at all: folders, safetensors, shards."""
