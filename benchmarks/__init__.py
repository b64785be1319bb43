"""Side-by-side benchmarks with peers. Run: `make bench`. Results: benchmarks/RESULTS.md."""
