"""A converted model on Kyutai's moshi runtime, frame by frame: live sessions, a server, answers, error rates, latency.

folder      a converted folder, opened: model, config, codec, tokenizer
runtime     the one door to the `moshi` package: load an export, make a generator
steering    which text tokens are forced, and when (the prompt; the text to say)
session     requests in, answers out, one batch at a time, as a deployment would run them
live        one session as it goes: a frame of sound in, text and sound out
sound       files, microphone and speakers, frame by frame
server      Kyutai's `moshi.server`, with prompts and any codec that streams; page/ is what browsers are given
connection  one client of the server, checked at the door
scoring     word error rates, by task
latency     response latency, split into its parts
"""
