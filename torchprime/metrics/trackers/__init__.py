"""Trackers that show a run: TensorBoard, Weights & Biases, MLflow, Trackio."""
