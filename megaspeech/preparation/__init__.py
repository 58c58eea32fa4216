"""From the audio people have to shards: manifests, decoding, text in time, augmentation, encoding."""
