// Package bootstrap is the command line protocol between containerd and a
// shim: what the caller asks for, in each of its generations, and how the
// answer is written.
//
//   - containerd up to 2.2, CRI-O and Docker with containerd 1.7 pass flags
//     and environment variables, the runtime options as a protobuf Any on
//     stdin, and read an address from stdout.
//   - containerd 2.3 and later pass the same flags, but a BootstrapParams
//     message on stdin, and read a BootstrapResult from stdout.
//
// containerd 1.7 and 2.0 to 2.2 can also read JSON. But nothing in their
// calls tells the two apart, and 1.7 refuses the version that 2.0 would gain
// from, so they get the plain address that all of them take as version 2.
//
// https://github.com/containerd/containerd/blob/v2.4.2/docs/runtime-v2.md
package bootstrap

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"path"
	"path/filepath"
	"unicode/utf8"

	bootapi "github.com/containerd/containerd/api/runtime/bootstrap/v1"
	"github.com/containerd/containerd/api/types"
	runcoptions "github.com/containerd/containerd/api/types/runc/options"
	runtimeoptions "github.com/containerd/containerd/api/types/runtimeoptions/v1"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
)

// Action is what the shim was called for.
type Action string

// The actions. Serve is the long-running process; the others end at once.
const (
	ActionServe   Action = ""
	ActionStart   Action = "start"
	ActionDelete  Action = "delete"
	ActionInfo    Action = "info"
	ActionVersion Action = "version"
)

// maxInput bounds what is read from stdin: the largest part is a
// configuration passed through the runtime options.
const maxInput = 1 << 20

// What the shim does itself about the mounts of a root file system, so that
// containerd's mount manager leaves them to it: erofs images become disks of the
// guest, and with them what is made of them there (share.Resolve).
var (
	MountTypes      = []string{"erofs"}
	MountTransforms = []string{"format", "mkdir"}
)

// DefaultSocketDir is where containerd keeps shim sockets.
const DefaultSocketDir = "/run/containerd/s"

// Invocation is a parsed call of the shim.
type Invocation struct {
	Action    Action
	ID        string
	Namespace string
	// Bundle is only given with delete, and is the working directory there.
	Bundle string
	// Address is containerd's gRPC socket, TTRPCAddress the one for events;
	// empty when the caller has none.
	Address      string
	TTRPCAddress string
	SocketDir    string
	Debug        bool
	// Bootstrap says that the caller speaks the protocol of containerd 2.3.
	Bootstrap bool
	Options   Options
}

// Options are those of the runtime options that concern this shim.
type Options struct {
	// ShimCgroup is the cgroup that the shim has to be placed in.
	ShimCgroup string `json:"shim_cgroup,omitempty"`
	// ConfigPath replaces the path of the configuration file; ConfigBody is
	// the file's content.
	ConfigPath string `json:"config_path,omitempty"`
	ConfigBody string `json:"config_body,omitempty"`
}

// Parse reads the command line, without the program's name, the environment
// and, for start, stdin.
func Parse(args []string, getenv func(string) string, stdin io.Reader) (Invocation, error) {
	var (
		in            Invocation
		version, info bool
		ignored       string
	)
	fs := flag.NewFlagSet("containerd-shim-microvm-v2", flag.ContinueOnError)
	fs.SetOutput(io.Discard)
	fs.BoolVar(&in.Debug, "debug", false, "log more")
	fs.BoolVar(&version, "v", false, "print the version")
	fs.BoolVar(&version, "version", false, "print the version")
	fs.BoolVar(&info, "info", false, "print the runtime's features as protobuf")
	fs.StringVar(&in.Namespace, "namespace", "", "containerd namespace of the task")
	fs.StringVar(&in.ID, "id", "", "id of the task")
	fs.StringVar(&in.Bundle, "bundle", "", "bundle to delete")
	fs.StringVar(&in.Address, "address", "", "containerd's gRPC address")
	// Callers pass these; events go to TTRPC_ADDRESS and the socket is ours
	// to name. The pod is told by start, for people to see.
	for _, name := range []string{"publish-binary", "socket", "debug-socket", "pod"} {
		fs.StringVar(&ignored, name, "", "ignored")
	}
	if err := fs.Parse(args); err != nil {
		return in, fmt.Errorf("command line: %w", err)
	}
	switch {
	case version:
		in.Action = ActionVersion
		return in, nil
	case info:
		in.Action = ActionInfo
		return in, nil
	}
	in.Action = Action(fs.Arg(0))
	if in.ID == "" || in.Namespace == "" {
		return in, errors.New("-id and -namespace are needed")
	}
	in.TTRPCAddress = getenv("TTRPC_ADDRESS")
	in.SocketDir = DefaultSocketDir
	switch in.Action {
	case ActionServe, ActionDelete:
		return in, nil
	case ActionStart:
		data, err := io.ReadAll(io.LimitReader(stdin, maxInput+1))
		if err != nil {
			return in, fmt.Errorf("read stdin: %w", err)
		}
		if len(data) > maxInput {
			return in, fmt.Errorf("more than %d bytes on stdin", maxInput)
		}
		if err := in.readStdin(data); err != nil {
			return in, err
		}
		// start passes them on as JSON, which would change them.
		if !utf8.ValidString(in.TTRPCAddress) || !utf8.ValidString(in.Options.ConfigBody) {
			return in, errors.New("TTRPC_ADDRESS, or the configuration in the runtime options, is not in UTF-8")
		}
		return in, nil
	default:
		return in, fmt.Errorf("unknown action %q", in.Action)
	}
}

// readStdin takes what start gets on stdin. Older callers' options may happen
// to parse as BootstrapParams, so these count only if they name the task that
// the flags name.
func (in *Invocation) readStdin(data []byte) error {
	var params bootapi.BootstrapParams
	if err := proto.Unmarshal(data, &params); err == nil &&
		params.GetInstanceID() == in.ID && params.GetNamespace() == in.Namespace {
		return in.readParams(&params)
	}
	var options anypb.Any
	if err := proto.Unmarshal(data, &options); err != nil {
		return nil // a caller's own matter: no option of it is for us
	}
	return in.Options.read(&options)
}

func (in *Invocation) readParams(params *bootapi.BootstrapParams) error {
	in.Bootstrap = true
	if a := params.GetContainerdGrpcAddress(); a != "" {
		in.Address = a
	}
	if a := params.GetContainerdTtrpcAddress(); a != "" {
		in.TTRPCAddress = a
	}
	if params.GetLogLevel() <= bootapi.LogLevel_LOG_LEVEL_DEBUG {
		in.Debug = true
	}
	if dir := params.GetSocketDir(); dir != "" {
		if !filepath.IsAbs(dir) {
			return fmt.Errorf("socket directory %q is not an absolute path", dir)
		}
		in.SocketDir = filepath.Clean(dir)
	}
	for _, e := range params.GetExtensions() {
		if err := in.Options.read(e.GetValue()); err != nil {
			return err
		}
	}
	return nil
}

// read takes the options from a message of a known type and leaves other ones
// alone. Type URLs come with and without a host.
func (o *Options) read(message *anypb.Any) error {
	switch path.Base(message.GetTypeUrl()) {
	case "containerd.runc.v1.Options":
		var runc runcoptions.Options
		if err := proto.Unmarshal(message.GetValue(), &runc); err != nil {
			return fmt.Errorf("runtime options: %w", err)
		}
		o.ShimCgroup = runc.GetShimCgroup()
	case "runtimeoptions.v1.Options":
		var generic runtimeoptions.Options
		if err := proto.Unmarshal(message.GetValue(), &generic); err != nil {
			return fmt.Errorf("runtime options: %w", err)
		}
		o.ConfigPath = generic.GetConfigPath()
		o.ConfigBody = string(generic.GetConfigBody())
	}
	return nil
}

// Answer is what start writes to stdout: the address the shim serves the task
// API on, over ttrpc.
func (in *Invocation) Answer(address string) ([]byte, error) {
	if !in.Bootstrap {
		return []byte(address), nil
	}
	result := &bootapi.BootstrapResult{
		Version:  3, // of the task API
		Address:  address,
		Protocol: "ttrpc",
	}
	if err := result.AddExtension(&types.MountCapabilities{Types: MountTypes, Transforms: MountTransforms}); err != nil {
		return nil, fmt.Errorf("bootstrap result: %w", err)
	}
	data, err := proto.Marshal(result)
	if err != nil {
		return nil, fmt.Errorf("bootstrap result: %w", err)
	}
	return data, nil
}
