"""What crosses between processes: protos, frames, certificates, ring streams."""
