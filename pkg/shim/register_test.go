package shim

import (
	"testing"

	taskv2 "github.com/containerd/containerd/api/runtime/task/v2"
	taskv3 "github.com/containerd/containerd/api/runtime/task/v3"
	"google.golang.org/protobuf/reflect/protoreflect"
)

// The two versions of the task API have the same methods with the same
// messages, so that one implementation serves both.
func TestTaskVersionsAreTheSame(t *testing.T) {
	v2 := taskv2.File_runtime_task_v2_shim_proto
	v3 := taskv3.File_runtime_task_v3_shim_proto
	if a, b := v2.Messages().Len(), v3.Messages().Len(); a != b {
		t.Errorf("%d and %d messages", a, b)
	}
	for i := range v3.Messages().Len() {
		message := v3.Messages().Get(i)
		old := v2.Messages().ByName(message.Name())
		if old == nil {
			t.Errorf("version 2 has no %s", message.Name())
			continue
		}
		if a, b := old.Fields().Len(), message.Fields().Len(); a != b {
			t.Errorf("%s has %d and %d fields", message.Name(), a, b)
		}
		for j := range message.Fields().Len() {
			field := message.Fields().Get(j)
			other := old.Fields().ByNumber(field.Number())
			if other == nil || other.Name() != field.Name() || other.Kind() != field.Kind() || other.Cardinality() != field.Cardinality() {
				t.Errorf("%s.%s differs", message.Name(), field.Name())
			}
		}
	}
	methods := func(f protoreflect.FileDescriptor) protoreflect.MethodDescriptors {
		return f.Services().Get(0).Methods()
	}
	if a, b := methods(v2).Len(), methods(v3).Len(); a != b || b != 17 {
		t.Errorf("%d and %d methods", a, b)
	}
	for i := range methods(v3).Len() {
		if name := methods(v3).Get(i).Name(); methods(v2).ByName(name) == nil {
			t.Errorf("version 2 has no %s", name)
		}
	}
}
