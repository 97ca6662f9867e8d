# Everything here works on a fresh Debian 12 as root; what is missing is installed from Debian first.
#   make demo       build, run the redis story, print the figures
#   make check      lints and unit tests
#   make test       lints, unit tests, engine tests, integration; ends with one line of counts
#   make bench      figures, beside those of runc with CRIU where they work
#   make programs   nginx, MariaDB, a JVM, Node.js and others, checkpointed while they work
#   make interop    images exchanged with runc and CRIU, where they work
#   make test-vm    pure cgroup v2, all capabilities, Debian's kernel, CRIU: chosen tests in a virtual machine
#   make manual     man pages and shell completions, in target/manual
#   make            build the release binary
#   make install    put it in $(DESTDIR)$(PREFIX)/bin
PREFIX ?= /usr/local
export PATH := $(PATH):$(HOME)/.cargo/bin
TARGET := $(or $(CARGO_TARGET_DIR),target)
BINARY := $(TARGET)/x86_64-unknown-linux-gnu/release/stasis

BUILD_NEEDS := gcc libc6-dev libseccomp-dev
DEMO_NEEDS := $(BUILD_NEEDS) busybox-static python3
TEST_NEEDS := $(DEMO_NEEDS) iproute2 util-linux criu python3-protobuf python3-grpcio docker.io containerd podman conmon buildah uidmap iptables nftables

.PHONY: all build check demo test lint unit engine interop integration programs test-vm bench manual install uninstall clean needs-build needs-demo needs-test

all: build

build: needs-build
	cargo build --release

demo: needs-demo
	cargo build --release
	integration/demo

# Lints and unit tests only: the inner loop.
check: lint unit

# All parts, or some: make test PARTS="lint unit engine".
test:
	@tests/all $(PARTS)

lint: needs-build
	cargo fmt --check
	cargo clippy --all-targets -- -D warnings
	RUSTDOCFLAGS="-D warnings" cargo doc --no-deps

unit: needs-build
	cargo test --lib --bins

engine: needs-build
	cargo test --test engine

integration: needs-test
	cargo build --release
	integration/run

# Images exchanged with runc and CRIU, both ways, for every fixture; skipped aloud where CRIU doesn't work.
interop: needs-test
	INTEROP=$$(command -v runc || echo runc) INTEROP_TABLE=docs/interop/criu-$$(criu --version | sed -n "s/^Version: *//p").md cargo test --test engine

# Real servers and language runtimes, checkpointed while they work.
programs: needs-test
	tests/needs debootstrap
	cargo build --release
	integration/run programs/

# WORDS chooses parts or tests: make test-vm WORDS="cgroup2 interop/pipes". The machine is made once, under target/vm.
test-vm: needs-test
	tests/needs qemu-system-x86 debootstrap e2fsprogs cpio checkpolicy
	integration/vm/test $(WORDS)

bench: needs-demo
	cargo build --release
	integration/bench

# Man pages, and completions for bash, zsh and fish, made of the definition that the command line is parsed with.
manual: needs-build
	cargo run --example manual -- $(TARGET)/manual

install: build
	install -D -m 0755 $(BINARY) $(DESTDIR)$(PREFIX)/bin/stasis

uninstall:
	rm -f $(DESTDIR)$(PREFIX)/bin/stasis

clean:
	cargo clean

needs-build:
	@tests/needs $(BUILD_NEEDS)
needs-demo:
	@tests/needs $(DEMO_NEEDS)
needs-test:
	@tests/needs $(TEST_NEEDS)
