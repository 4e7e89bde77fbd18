"""The main job: fine-tune a pretrained model on plain text or conversations."""
