package shim

import (
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	cgroup2 "github.com/containerd/cgroups/v3/cgroup2/stats"
	sandboxapi "github.com/containerd/containerd/api/runtime/sandbox/v1"
	taskapi "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/errdefs"
	"github.com/containerd/ttrpc"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/microvm-runtime/microvm/pkg/agentproto"
)

// guestText is all the text in messages of the guest's, and what the shim does
// with it. None of it is a path of the host, nor becomes a part of one.
var guestText = map[string]string{
	"microvm.agent.v1.InfoResponse.version":         "goes to the log, made printable",
	"microvm.agent.v1.InfoResponse.kernel_release":  "goes to the log, made printable",
	"microvm.agent.v1.InfoResponse.kernel_version":  "goes to the log, made printable",
	"microvm.agent.v1.ProcessEntry.exec_id":         "is looked up among the processes that were made",
	"microvm.agent.v1.OOMKill.container_id":         "is looked up among the containers that were made",
	"google.protobuf.Any.type_url":                  "is compared with that of metrics",
	"google.protobuf.Any.value":                     "is parsed as metrics",
	"io.containerd.cgroups.v2.HugeTlbStat.pagesize": "is containerd's to read",
	"io.containerd.cgroups.v2.NetworkStat.name":     "is containerd's to read",
	"io.containerd.cgroups.v2.RdmaEntry.device":     "is containerd's to read",
	"ttrpc.Response.payload":                        "is the reply",
	"google.rpc.Status.message":                     "is repeated in errors, made printable",
}

// agentReplies are the messages that the agent sends, by method.
func agentReplies() map[string]protoreflect.MessageDescriptor {
	methods := agentproto.File_agent_proto.Services().ByName("Agent").Methods()
	replies := map[string]protoreflect.MessageDescriptor{}
	for i := range methods.Len() {
		replies[string(methods.Get(i).Name())] = methods.Get(i).Output()
	}
	return replies
}

// textOf adds the fields with text of a message and of those in it.
func textOf(m protoreflect.MessageDescriptor, found map[string]bool, seen map[protoreflect.FullName]bool) {
	if seen[m.FullName()] {
		return
	}
	seen[m.FullName()] = true
	for i := range m.Fields().Len() {
		switch field := m.Fields().Get(i); field.Kind() {
		case protoreflect.StringKind, protoreflect.BytesKind:
			found[string(field.FullName())] = true
		case protoreflect.MessageKind, protoreflect.GroupKind:
			textOf(field.Message(), found, seen)
		}
	}
}

// TestGuestTextIsKnown: whoever adds a field with text to a message of the guest's
// says here what becomes of it.
func TestGuestTextIsKnown(t *testing.T) {
	found, seen := map[string]bool{}, map[protoreflect.FullName]bool{}
	for _, reply := range agentReplies() {
		textOf(reply, found, seen)
	}
	textOf((&cgroup2.Metrics{}).ProtoReflect().Descriptor(), found, seen)
	textOf((&ttrpc.Response{}).ProtoReflect().Descriptor(), found, seen)
	if want, got := slices.Sorted(maps.Keys(guestText)), slices.Sorted(maps.Keys(found)); !slices.Equal(got, want) {
		t.Errorf("the guest's messages have the text\n %q, known is\n %q", got, want)
	}
}

// fill sets all of a message: text to this one, numbers to 1, and one of each list.
func fill(t *testing.T, m protoreflect.Message, text string) {
	t.Helper()
	value := func(field protoreflect.FieldDescriptor, empty func() protoreflect.Value) protoreflect.Value {
		switch field.Kind() {
		case protoreflect.StringKind:
			return protoreflect.ValueOfString(text)
		case protoreflect.BytesKind:
			return protoreflect.ValueOfBytes([]byte(text))
		case protoreflect.Uint32Kind:
			return protoreflect.ValueOfUint32(1)
		case protoreflect.Uint64Kind:
			return protoreflect.ValueOfUint64(1)
		case protoreflect.DoubleKind:
			return protoreflect.ValueOfFloat64(1)
		case protoreflect.MessageKind:
			v := empty()
			if any, ok := v.Message().Interface().(*anypb.Any); ok {
				var metrics cgroup2.Metrics
				fill(t, metrics.ProtoReflect(), text)
				data, err := proto.Marshal(&metrics)
				if err != nil {
					t.Fatal(err)
				}
				any.TypeUrl, any.Value = text+"/io.containerd.cgroups.v2.Metrics", data
				return v
			}
			fill(t, v.Message(), text)
			return v
		}
		t.Fatalf("%s is of a kind that this test does not know", field.FullName())
		return protoreflect.Value{}
	}
	fields := m.Descriptor().Fields()
	for i := range fields.Len() {
		switch field := fields.Get(i); {
		case field.IsList():
			list := m.Mutable(field).List()
			list.Append(value(field, list.NewElement))
		default:
			m.Set(field, value(field, func() protoreflect.Value { return m.NewField(field) }))
		}
	}
}

// outside is a directory that nobody has to do with, and what happens in it.
type outside struct {
	t             *testing.T
	watch         int
	secret, inner string
}

func newOutside(t *testing.T) *outside {
	t.Helper()
	dir := t.TempDir()
	o := &outside{t: t, secret: filepath.Join(dir, "secret"), inner: filepath.Join(dir, "made-up")}
	if err := os.WriteFile(o.secret, []byte("secret"), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Chdir(dir) // what is relative is in there, too
	var err error
	if o.watch, err = unix.InotifyInit1(unix.IN_NONBLOCK | unix.IN_CLOEXEC); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(o.watch) })
	for _, path := range []string{dir, o.secret} {
		if _, err := unix.InotifyAddWatch(o.watch, path, unix.IN_ALL_EVENTS); err != nil {
			t.Fatal(err)
		}
	}
	return o
}

// events are what was opened, made, changed or removed since.
func (o *outside) events() (list []string) {
	o.t.Helper()
	buffer := make([]byte, 64<<10)
	n, err := unix.Read(o.watch, buffer)
	if errors.Is(err, unix.EAGAIN) {
		return nil
	}
	if err != nil {
		o.t.Fatal(err)
	}
	for b := buffer[:n]; len(b) > 0; {
		length := unix.SizeofInotifyEvent + int(binary.NativeEndian.Uint32(b[12:]))
		list = append(list, fmt.Sprintf("%#x of %q", binary.NativeEndian.Uint32(b[4:]), unix.ByteSliceToString(b[unix.SizeofInotifyEvent:length])))
		b = b[length:]
	}
	return list
}

// TestGuestNamesNoPath: an agent that has paths of the host for all the text it
// sends, in replies, events and errors, has the shim touch none of them.
func TestGuestNamesNoPath(t *testing.T) {
	o := newOutside(t)
	if _, err := os.ReadFile(o.secret); err != nil || len(o.events()) == 0 {
		t.Fatalf("the watch does not see what is opened: %v", err)
	}
	for name, text := range map[string]string{
		"absolute": o.secret, "absolute, not there": o.inner, "from anywhere": strings.Repeat("../", 40) + o.secret,
		"by a link to the root": "/proc/self/root" + o.secret, "by a link to the directory": "/proc/self/cwd/secret",
		"relative": "secret", "relative, not there": "./made-up/.", "URL": "file://" + o.inner, "address": "unix://" + o.inner,
	} {
		for _, fails := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, errors %v", name, fails), func(t *testing.T) {
				liveWith(t, text, fails)
				if list := o.events(); len(list) > 0 {
					t.Errorf("events outside: %q", list)
				}
			})
		}
	}
}

// liveWith takes a sandbox through its life with an agent that says text wherever
// it can: in replies, or else in errors once a container runs.
func liveWith(t *testing.T, text string, fails bool) {
	f := newFixture(t)
	spoil := func(name string, _ any) (any, error) {
		if fails {
			return nil, fmt.Errorf("%s: %w", text, errdefs.ErrInvalidArgument)
		}
		reply, found := agentReplies()[name], map[string]bool{}
		if textOf(reply, found, map[protoreflect.FullName]bool{}); len(found) == 0 {
			return nil, nil // the fake agent does it, so that things go on
		}
		message, err := protoregistry.GlobalTypes.FindMessageByName(reply.FullName())
		if err != nil {
			return nil, err
		}
		m := message.New()
		fill(t, m, text)
		return m.Interface(), nil
	}
	if !fails {
		f.agent.SetIntercept(spoil)
	}
	f.createSandbox("pod")
	if err := f.startSandbox("pod"); err != nil {
		t.Fatal(err)
	}
	f.create("c1", "sleep")
	f.start("c1", "")
	if err := f.exec("c1", "e1", "sleep"); err != nil {
		t.Fatal(err)
	}
	f.start("c1", "e1")
	f.agent.SetIntercept(spoil)
	f.agent.OOM(text)

	ctx := t.Context()
	for i, call := range []func() error{
		func() error { _, err := f.Pids(ctx, &taskapi.PidsRequest{ID: "c1"}); return err },
		func() error { _, err := f.Stats(ctx, &taskapi.StatsRequest{ID: "c1"}); return err },
		func() error {
			_, err := f.SandboxMetrics(ctx, &sandboxapi.SandboxMetricsRequest{SandboxID: "pod"})
			return err
		},
		func() error { return f.exec("c1", "e2", "sleep") },
		func() error {
			_, err := f.Create(ctx, &taskapi.CreateTaskRequest{ID: "c2", Bundle: f.bundle(nil, "sleep")})
			return err
		},
		func() error { _, err := f.Pause(ctx, &taskapi.PauseRequest{ID: "c1"}); return err },
	} {
		if err := call(); (err != nil) != fails {
			t.Errorf("call %d: %v", i, err)
		}
	}
	f.agent.SetIntercept(nil)
	f.Resume(ctx, &taskapi.ResumeRequest{ID: "c1"})
	if !fails {
		f.kill("c2", "")
		f.wait("c2", "")
		f.delete("c2", "")
	}
	f.kill("c1", "")
	f.wait("c1", "e1")
	f.delete("c1", "e1")
	f.wait("c1", "")
	f.delete("c1", "")
	if err := f.stopSandbox("pod"); err != nil {
		t.Error(err)
	}
	if err := f.shutdownSandbox("pod"); err != nil {
		t.Error(err)
	}
}
