"""How fast a whole training step is, where its time goes, and what people would pick instead takes for the same.

And codecs beside each other: how near their sound is, in how many bits, at what speed.
"""
