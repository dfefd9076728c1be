"""The two outside worlds of the tests and the demo, in process: Firestore and Kubernetes."""
