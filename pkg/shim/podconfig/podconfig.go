// Package podconfig is what the CRI plugin of containerd says about a pod to a
// shim that is its sandboxer.
package podconfig

// TypeName is that of the options of a sandbox that are a PodSandboxConfig.
const TypeName = "runtime.v1.PodSandboxConfig"
