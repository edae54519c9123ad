#!/bin/sh
# Generates the Go code of pkg/agentproto and pkg/shim/podconfig from their .proto
# files. Needed only after a change of these: the result is in the repository.
#
# Needs protoc and its well-known types (Debian: protobuf-compiler,
# libprotobuf-dev). The two plugins are built from the versions go.mod names.
set -eu

cd "$(dirname "$0")/.."

plugins=$(mktemp -d)
trap 'rm -rf "$plugins"' EXIT

version() {
	go list -m -f '{{.Version}}' "$1"
}
GOBIN=$plugins go install "google.golang.org/protobuf/cmd/protoc-gen-go@$(version google.golang.org/protobuf)"
GOBIN=$plugins go install "github.com/containerd/ttrpc/cmd/protoc-gen-go-ttrpc@$(version github.com/containerd/ttrpc)"

PATH=$plugins:$PATH protoc \
	--proto_path=pkg/agentproto --proto_path=/usr/include \
	--go_out=pkg/agentproto --go_opt=paths=source_relative \
	--go-ttrpc_out=pkg/agentproto --go-ttrpc_opt=paths=source_relative \
	agent.proto

PATH=$plugins:$PATH protoc \
	--proto_path=pkg/shim/podconfig \
	--go_out=pkg/shim/podconfig --go_opt=paths=source_relative \
	podconfig.proto
