"""The API server: who may ask, which worker answers, and the relay of its bytes."""
