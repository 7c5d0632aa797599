"""What a teacher has said, kept on disk by sample and view, so that it is paid once."""
