"""The controller's room: who serves which model, and which worker takes the next request."""
