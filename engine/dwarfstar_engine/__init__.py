"""DwarfStar's engine: one GGUF model, split by layers over node processes, served behind one endpoint.

Data flows one way: model file -> plan -> stage -> wire -> coordinator (``node``) -> API and front ends.
"""

__version__ = "0.1.0"
