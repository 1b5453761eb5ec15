"""Chat completions and Anthropic's Messages, each said in the other: requests, whole answers, and streams.

What has no counterpart is refused by name where leaving it out would change the answer, and left out where it would
not. Not carried over: signatures of thinking (so thinking of earlier turns is left out of a request to Messages),
citations, log-probabilities.
"""
