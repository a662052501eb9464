"""Training the default heads on one GPU with `medusa` alone: no Ray, no DeepSpeed, no MLflow. See README.md."""
