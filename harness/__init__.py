"""The harness: what did a vision encoder learn?"""
