"""Speculative decoding: guess at the next tokens, and let one step check all guesses (Leviathan et al., 2023).

The token at a position is a function of its logits, the request's parameters and (seed, choice, position). A guess
counts when it is the very token that is sampled there, so speculation changes how many tokens a step brings and never
which. Rejection sampling, which keeps the distribution but not the tokens, was not needed.
"""
