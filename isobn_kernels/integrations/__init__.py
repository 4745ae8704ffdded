"""IsoBN inside other libraries; each file imports its library, and says which extra to install where it is missing."""
