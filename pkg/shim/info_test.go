package shim

import (
	"bytes"
	"encoding/json"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/containerd/api/types"
	runcoptions "github.com/containerd/containerd/api/types/runc/options"
	"github.com/containerd/containerd/v2/core/runtime"
	"github.com/containerd/typeurl/v2"
	"github.com/opencontainers/runtime-spec/specs-go/features"
	"google.golang.org/protobuf/proto"
)

// containerd understands the answer to -info.
func TestInfo(t *testing.T) {
	_ = runtime.TaskCreateEventTopic // its package registers the type
	options, err := typeurl.MarshalAnyToProto(&runcoptions.Options{ShimCgroup: "/s"})
	if err != nil {
		t.Fatal(err)
	}
	input, err := proto.Marshal(options)
	if err != nil {
		t.Fatal(err)
	}
	for _, stdin := range [][]byte{nil, input} {
		var out bytes.Buffer
		if err := printInfo(bytes.NewReader(stdin), &out); err != nil {
			t.Fatal(err)
		}
		var info types.RuntimeInfo
		if err := proto.Unmarshal(out.Bytes(), &info); err != nil {
			t.Fatal(err)
		}
		if info.Name != Name || info.Version.GetVersion() == "" ||
			info.Annotations["containerd.io/runtime-allow-mounts"] != "erofs,format/*,mkdir/*" {
			t.Errorf("%v", &info)
		}
		if len(stdin) > 0 && info.Options.GetTypeUrl() != options.TypeUrl {
			t.Errorf("options %v", info.Options)
		}
		f, err := typeurl.UnmarshalAny(info.Features)
		if err != nil {
			t.Fatal(err)
		}
		feat, ok := f.(*features.Features)
		if !ok || !slices.Contains(feat.MountOptions, "rro") || !slices.Contains(feat.Linux.Namespaces, "user") ||
			!*feat.Linux.MountExtensions.IDMap.Enabled {
			text, _ := json.Marshal(f)
			t.Errorf("%T %s", f, text)
		}
	}
	if err := printInfo(strings.NewReader("\xff"), &bytes.Buffer{}); err == nil {
		t.Error("no error for options that are none")
	}
}

func TestVersion(t *testing.T) {
	var out bytes.Buffer
	if err := printVersion(&out); err != nil || !strings.Contains(out.String(), "Version:") {
		t.Errorf("%q, %v", out.String(), err)
	}
}
