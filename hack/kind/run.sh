#!/bin/bash
# Runs the black-box tests of pods (test/e2e/k8s) in a cluster of kind's, on a machine with Docker whose /dev/kvm boots the
# guest kernel; the cluster is deleted at the end.
# usage: hack/kind/run.sh [SANDBOXER [PATTERN]]      podsandbox (the default) or shim; only tests that PATTERN names
# It wants kind 0.27 or later, whose nodes have containerd 2, and lets it pull its node image; KIND_NODE_IMAGE names another.
set -euo pipefail
# shellcheck source=../tools/lib.sh
. "$(dirname "$0")/../tools/lib.sh"
cd "$REPO"
PATH=$MICROVM_CACHE/tools/bin:$PATH
sandboxer=${1:-podsandbox} pattern=${2:-.}
deployed=deploy/k8s/containerd-$sandboxer.toml
[ -f "$deployed" ] || die "unknown sandboxer $sandboxer"
for program in kind docker kubectl; do
	command -v $program >/dev/null || die "$program is missing"
done
reason=$(hack/testbed/probe.sh) || die "a node of kind's needs a KVM that boots the guest kernel: $reason"

cluster=microvm-e2e-$$
scratch
trap 'kind delete cluster --name "$cluster" >/dev/null 2>&1 || :; rm -rf "$SCRATCH"' EXIT
export KUBECONFIG=$SCRATCH/kubeconfig

# The shim finds what it needs in /usr/lib/microvm. The patch is the configuration that deploy/k8s has for everybody.
cat >"$SCRATCH/cluster.yaml" <<Y
kind: Cluster
apiVersion: kind.x-k8s.io/v1alpha4
nodes:
- role: control-plane
  labels: {microvm.io/ready: "true"}
  extraMounts:
  - {hostPath: "$REPO/bin/containerd-shim-microvm-v2", containerPath: /usr/local/bin/containerd-shim-microvm-v2, readOnly: true}
  - {hostPath: "$REPO/bin/microvm-vmm", containerPath: /usr/lib/microvm/microvm-vmm, readOnly: true}
  - {hostPath: "$REPO/bin/vmlinux", containerPath: /usr/lib/microvm/vmlinux, readOnly: true}
  - {hostPath: "$REPO/bin/guest.erofs", containerPath: /usr/lib/microvm/guest.erofs, readOnly: true}
  - {hostPath: "$REPO/test/e2e/k8s/seccomp", containerPath: /var/lib/kubelet/seccomp, readOnly: true}
containerdConfigPatches:
- |-
$(grep -v '^version' "$deployed" | sed 's/^/  /')
Y
kind create cluster --name "$cluster" --config "$SCRATCH/cluster.yaml" --wait 5m ${KIND_NODE_IMAGE:+--image "$KIND_NODE_IMAGE"}
for image in pause box web programs; do
	kind load image-archive --name "$cluster" "$MICROVM_CACHE/images/$image.tar"
done
kubectl apply -f deploy/k8s/runtimeclass.yaml
cd test/e2e/k8s
E2E_RUNTIME_CLASS=microvm go test -count=1 -v -tags e2e -timeout 60m -run "$pattern" .
