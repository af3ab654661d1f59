"""Reads how many processes on how many machines form one model: rtp-llm's environment and its file of machines."""
