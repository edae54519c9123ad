// Package shim is containerd-shim-microvm-v2: containerd's runtime API for
// containers that run in a virtual machine, one machine for each sandbox.
//
// The program is called in several ways, see package bootstrap. `start` starts
// the process that serves a sandbox, or finds the one that does; `delete`
// cleans up after one that is gone.
package shim

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"runtime/debug"

	"github.com/containerd/containerd/v2/pkg/identifiers"

	"github.com/microvm-runtime/microvm/pkg/shim/bootstrap"
	"github.com/microvm-runtime/microvm/pkg/shim/state"
)

// Name is the runtime's.
const Name = "io.containerd.microvm.v2"

// Version of the program, set by the build.
var Version = "dev"

// Program is the shim's program. The zero value is the one to run; tests put
// parts in.
type Program struct {
	// stateRoot replaces state.Root.
	stateRoot string
	// launch replaces launch.
	launch func(context.Context, launchRequest) (machine, error)
}

// Run does what the command line asks for and returns the exit code.
func (p *Program) Run(args []string, stdin io.Reader, stdout, stderr io.Writer) int {
	if p.stateRoot == "" {
		p.stateRoot = state.Root
	}
	if p.launch == nil {
		p.launch = launch
	}
	in, err := bootstrap.Parse(args, os.Getenv, stdin)
	if err == nil {
		switch in.Action {
		case bootstrap.ActionVersion:
			err = printVersion(stdout)
		case bootstrap.ActionInfo:
			err = printInfo(stdin, stdout)
		case bootstrap.ActionStart:
			err = p.start(in, stdout)
		case bootstrap.ActionDelete:
			err = p.delete(in, stdout, stderr)
		case bootstrap.ActionServe:
			err = p.serve(in, stdin)
		}
	}
	if err != nil {
		fmt.Fprintf(stderr, "%s: %v\n", Name, err)
		return 1
	}
	return 0
}

// groupAnnotations name a container's sandbox, in the order they count:
// containers with the same value share a virtual machine.
var groupAnnotations = []string{
	"io.containerd.runc.v2.group",
	"io.kubernetes.cri.sandbox-id",
}

// sandboxOf returns the name of the sandbox that a bundle's container belongs
// to: its own id if no annotation names one, or the bundle has no
// specification. With it comes the pod's name, as podName has it.
func sandboxOf(bundle, id string) (group, pod string, err error) {
	var spec struct {
		Annotations map[string]string `json:"annotations"`
	}
	switch err := readConfig(bundle, &spec); {
	case errors.Is(err, fs.ErrNotExist):
		return id, "", nil
	case err != nil:
		return "", "", err
	}
	pod = podName(spec.Annotations)
	for _, name := range groupAnnotations {
		if group := spec.Annotations[name]; group != "" {
			if err := identifiers.Validate(group); err != nil {
				return "", "", fmt.Errorf("annotation %s: %w", name, err)
			}
			return group, pod, nil
		}
	}
	return id, pod, nil
}

// podName is that of the pod whose annotations from the CRI plugin a container
// has, with its namespace; empty if there is none.
func podName(annotations map[string]string) string {
	return joinPodName(annotations["io.kubernetes.cri.sandbox-namespace"], annotations["io.kubernetes.cri.sandbox-name"])
}

func joinPodName(namespace, name string) string {
	if namespace == "" || name == "" {
		return ""
	}
	return namespace + "/" + name
}

// machineName is what people know a sandbox by: the pod and its id, or without a
// pod containerd's namespace and the id in there.
func machineName(pod, namespace, id string) []string {
	if pod == "" {
		pod = namespace
	}
	return []string{pod, id}
}

// tuneMemory keeps a process small that is idle nearly always.
func tuneMemory() {
	debug.SetGCPercent(40)
}
