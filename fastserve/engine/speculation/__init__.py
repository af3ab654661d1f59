"""Speculative decoding: propose draft tokens, and verify all of them in one step (Leviathan et al., 2023).

The token at a position is a function of its logits, the request's sampling parameters and (seed, choice, position). A
draft is accepted if it equals the token sampled there, so speculation changes the number of tokens in a step and never
the tokens. Rejection sampling, which keeps the distribution but not the tokens, is not needed.
"""
