"""Frame-by-frame evaluation of an exported model on Kyutai's moshi runtime: answers, error rates, latency.

folder      a converted folder, opened: model, config, codec, tokenizer
runtime     the one door to the `moshi` package: load an export, make a generator
steering    which text tokens are forced, and when (the prompt; the text to say)
session     requests in, answers out, one batch at a time, as a deployment would run them
transcript  the words that an answer wrote, and in which frames
scoring     word error rates, by task
latency     response latency, split into its parts
"""
