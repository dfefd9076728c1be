"""What the tests and the tools stand on: a Firestore and a Kubernetes API, and a world of both."""
