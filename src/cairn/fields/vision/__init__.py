"""Images: labelled pictures as a field of training, the ViT family, and how pixels become a model's inputs."""
