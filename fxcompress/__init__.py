"""The compiler: capture, plan, rewrite, prove, emit and report neural networks."""
