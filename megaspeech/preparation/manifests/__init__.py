"""Manifests as people have them, one file a format; each reads one line into `Utterance` records."""
