"""The data layer: packed shards in, batches of uint8 images out, in one exact order."""
