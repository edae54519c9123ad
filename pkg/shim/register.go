package shim

import (
	"context"

	taskapi "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/ttrpc"
)

// register serves the task API in both versions. They differ in nothing but
// the name of the service: the messages are the same, which a test makes sure
// of.
func register(server *ttrpc.Server, s taskapi.TTRPCTaskService) {
	methods := map[string]ttrpc.Method{
		"State":      method(s.State),
		"Create":     method(s.Create),
		"Start":      method(s.Start),
		"Delete":     method(s.Delete),
		"Pids":       method(s.Pids),
		"Pause":      method(s.Pause),
		"Resume":     method(s.Resume),
		"Checkpoint": method(s.Checkpoint),
		"Kill":       method(s.Kill),
		"Exec":       method(s.Exec),
		"ResizePty":  method(s.ResizePty),
		"CloseIO":    method(s.CloseIO),
		"Update":     method(s.Update),
		"Wait":       method(s.Wait),
		"Stats":      method(s.Stats),
		"Connect":    method(s.Connect),
		"Shutdown":   method(s.Shutdown),
	}
	for _, name := range []string{"containerd.task.v2.Task", "containerd.task.v3.Task"} {
		server.RegisterService(name, &ttrpc.ServiceDesc{Methods: methods})
	}
}

// registerSandbox serves the sandbox API.
func registerSandbox(server *ttrpc.Server, s *service) {
	server.RegisterService("containerd.runtime.sandbox.v1.Sandbox", &ttrpc.ServiceDesc{Methods: map[string]ttrpc.Method{
		"CreateSandbox":   method(s.CreateSandbox),
		"StartSandbox":    method(s.StartSandbox),
		"Platform":        method(s.Platform),
		"StopSandbox":     method(s.StopSandbox),
		"WaitSandbox":     method(s.WaitSandbox),
		"SandboxStatus":   method(s.SandboxStatus),
		"PingSandbox":     method(s.PingSandbox),
		"ShutdownSandbox": method(s.ShutdownSandbox),
		"SandboxMetrics":  method(s.SandboxMetrics),
		"UpdateSandbox":   method(s.UpdateSandbox),
	}})
}

// method adapts a function of the service and gives errors their code.
func method[Request, Response any](f func(context.Context, *Request) (*Response, error)) ttrpc.Method {
	return func(ctx context.Context, unmarshal func(any) error) (any, error) {
		var request Request
		if err := unmarshal(&request); err != nil {
			return nil, err
		}
		response, err := f(ctx, &request)
		if err != nil {
			return nil, errgrpc.ToGRPC(err)
		}
		return response, nil
	}
}
