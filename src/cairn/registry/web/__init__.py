"""The registry as local pages: server-rendered, nothing loaded from elsewhere, nothing written by looking."""
