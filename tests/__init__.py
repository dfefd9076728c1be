"""The tests of queue-scaler, and the worlds they run it in."""
