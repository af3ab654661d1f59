"""Request schemas of the OpenAI API, shared by the API server and the workers, and what all answers have in common."""
