//! The engine as an embedder sees it, over real instances.
